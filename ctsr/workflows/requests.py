"""What commands can be asked: each field is an option, its default the command's.

Knows no NumPy and no torch, so that --help can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from ctsr.errors import UsageError
from ctsr.infer.sampling import SAMPLERS, Sampling
from ctsr.workflows import options as o
from ctsr.workflows.options import option

__all__ = [
    "Conversion", "EncodeLatents", "FileOptions", "FinetuneVae", "ScanTraining", "Simulation", "TrainBaseline",
    "TrainDiffusion", "Training", "Wanted",
]  # fmt: skip

Triple = tuple[int, int, int]
FACTORS = [str(factor) for factor in range(2, 9)]
z_truth_max = partial(
    option, "Scans up to this slice spacing (mm) train along z.", 1.5, advanced=True, min=0.05
)
vae_checkpoint = partial(
    option, "From finetune-vae; default: checkpoints/vae/best.safetensors of the project.", metavar="PATH"
)
patch_size = partial(option, metavar="D H W")


@dataclass(frozen=True, slots=True, kw_only=True)
class InProject:
    """What is not given lies in a project folder."""

    data_dir: Path | None = option("Thin scans and their lists; default: data/ of the project.")
    project: Path | None = o.project()
    device: str = o.device()
    seed: int = o.seed()
    threads: int | None = o.threads()

    def place(self, given: Path | None, *parts: str) -> Path:
        """The place that was given, else the one in the project."""
        return given or (self.project or Path()).joinpath(*parts)

    @property
    def data(self) -> Path:
        """The folder of scans and of the lists of them."""
        return self.place(self.data_dir, "data")

    def vae(self, given: str | None) -> str:
        """The file of the autoencoder, or its name."""
        return given or str(self.place(None, "checkpoints", "vae", "best.safetensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(InProject):
    """What all trainings can be asked. patch_size: (D, H, W)."""

    kind: ClassVar[str]
    smallest_side: ClassVar[int] = 16  # of a patch

    train_split: Path | None = option("List of scans to train on; default: train_files.txt of the data.")
    val_split: Path | None = option("List of scans that choose the best; default: val_files.txt of the data.")
    output_dir: Path | None = option("Default: a folder in checkpoints/ of the project.")
    max_steps: int | None = option("Steps in all; 20000 where neither this nor --epochs is given.", min=1)
    epochs: int | None = option("Instead of --max-steps: 256 samples from each scan are one.", min=1)
    batch_size: int = option("Samples a step (a process).", 4, min=1)
    patch_size: Triple
    resume: Literal["auto", "no"] = option(
        "Go on where the folder's last run stopped, or start afresh.", "auto"
    )
    lr: float = option("Peak learning rate.", 2e-4, min=1e-8, max=1.0)
    warmup_steps: int = option("Steps to the peak rate.", 300, advanced=True, min=0)
    validate_every: int = option("Steps between validations.", 2000, advanced=True, min=1)
    save_every: int = 100
    use_amp: bool = option("Mixed precision (bfloat16).", False, advanced=True)
    gradient_checkpointing: bool = option("Less memory, more time.", False, advanced=True)
    log: Literal["tensorboard", "none"] = option("Where the curves go as well.", "none", advanced=True)
    workers: int = o.workers()

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise UsageError("--max-steps and --epochs exclude each other")
        if min(self.patch_size) < self.smallest_side:
            raise UsageError(
                f"--patch-size: {self.patch_size} needs {self.smallest_side} voxels a side at least"
            )

    @property
    def splits(self) -> tuple[Path, Path]:
        """The lists to train on and to validate on."""
        data = self.data
        return self.train_split or data / "train_files.txt", self.val_split or data / "val_files.txt"

    @property
    def folder(self) -> Path:
        """Where the run leaves its files."""
        return self.place(self.output_dir, "checkpoints", self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanTraining(Training):
    """What a training on scans can be asked."""

    z_truth_max: float = z_truth_max()
    init: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBaseline(ScanTraining):
    """What `train-baseline` can be asked."""

    kind = "baseline"

    output_dir: Path | None = option("Default: checkpoints/baseline/ of the project.")
    patch_size: Triple = patch_size("Thin voxels of a pair.", (40, 96, 96))
    init: str | None = option("Start from these weights: baseline (shipped) or a .safetensors file.")
    lr: float = option("Peak learning rate.", 1e-3, min=1e-8, max=1.0)
    validate_every: int = option("Steps between validations.", 500, advanced=True, min=1)


INIT = (
    "Weights to start from: none, mri-autoencoder (ctsr download-weights), or a .safetensors file of this command or "
    "of a 2D autoencoder in the layout of diffusers, whose plan it takes."
)
KL = "Of the mean KL beside a mean error in 1000 HU; default: 1e-6 × latent channels / voxels of a block."


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneVae(ScanTraining):
    """What `finetune-vae` can be asked."""

    kind = "vae"

    output_dir: Path | None = option("Default: checkpoints/vae/ of the project.")
    batch_size: int = option("Samples a step (a process).", 2, min=1)
    patch_size: Triple = patch_size("Voxels of a sample.", (32, 64, 64))
    init: str | None = option(INIT, "none")
    preset: Literal["tiny", "compact", "full", "mri"] | None = option("Default: compact, or what --init has.")
    kl_weight: float | None = option(KL, min=0.0, max=1.0)

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        if self.init not in (None, "none") and self.preset is not None:
            raise UsageError("--preset and --init exclude each other: the weights bring their plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainDiffusion(Training):
    """What `train-diffusion` can be asked; its patches are counted in latent voxels."""

    kind = "diffusion"
    smallest_side = 1

    latent_dir: Path | None = option("From encode-latents; default: latents/ of the project.")
    output_dir: Path | None = option("Default: checkpoints/diffusion/ of the project.")
    vae_checkpoint: str | None = vae_checkpoint()
    preset: Literal["tiny", "compact", "full"] = option("How large the network is.", "compact")
    batch_size: int = option("Samples a step (a process).", 6, min=1)
    patch_size: Triple = patch_size("Latent voxels of a sample.", (8, 24, 24))
    num_steps: int = option("Diffusion steps of a validation.", 15, min=1, max=1000)
    samples: int = option("Samples whose mean a validation scores.", 4, min=1, max=64)
    sampler: str = option(f"{', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}.", "multistep")
    schedule: Literal["ctsr", "published"] = option(
        "published: ResShift's constants, κ = 2.", "ctsr", advanced=True
    )
    kappa: float | None = option("Noise, in residuals; default: measured.", advanced=True, min=0.01, max=100)
    model_channels: int | None = option("Instead of the preset's.", advanced=True, min=4, max=512)
    guidance_dropout: float = option("Share without stage one.", 0.1, advanced=True, min=0, max=0.9)
    warmup_steps: int = option("Steps to the peak rate.", 500, advanced=True, min=0)

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        if self.kappa is not None and self.schedule == "published":
            raise UsageError("--kappa and --schedule published exclude each other")
        _ = self.sampling  # refuses what is no sampler

    @property
    def sampling(self) -> Sampling:
        """What a validation draws."""
        return Sampling(sampler=self.sampler, num_steps=self.num_steps, samples=self.samples)

    @property
    def latents(self) -> Path:
        """The folder of latents."""
        return self.place(self.latent_dir, "latents")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeLatents(InProject):
    """What `encode-latents` can be asked. An autoencoder knows no flip by itself: hence the variants."""

    file_list: Path | None = option("Default: train_files.txt and val_files.txt of the data.")
    output_dir: Path | None = option("Default: latents/ of the project.")
    vae_checkpoint: str | None = vae_checkpoint()
    stage_one: str = option(
        "The network whose results the diffusion will refine; best one that never saw these scans.",
        "baseline",
        metavar="NAME|PATH",
    )
    factors: str = option("How much thicker the simulated slices are, 2 to 8.", "2,3,4,5", metavar="F,F…")
    variants: int = option("Of each scan and factor: other thicknesses and flips.", 2, min=1, max=64)
    skip_existing: bool = o.skip_existing()
    overwrite: bool = o.overwrite()
    shard: str | None = o.shard()
    dtype: Literal["fp16", "bf16", "fp32"] = option("Of the stored latents.", "fp16", advanced=True)
    z_truth_max: float = z_truth_max()

    def __post_init__(self) -> None:
        if not all(word in FACTORS for word in self.factors.split(",")):
            raise UsageError(f"--factors: {self.factors} are no whole numbers in 2…8 with commas between")
        if self.overwrite and self.skip_existing:
            raise UsageError("--overwrite and --skip-existing exclude each other")

    @property
    def latents(self) -> Path:
        """The folder of latents."""
        return self.place(self.output_dir, "latents")


WHERE = (
    "Only series with, say, SliceThickness<=1.5 or ConvolutionKernel~B30f|STANDARD or slices>=50; may be repeated, all "
    "must hold. Quote it: the shell reads < and |."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert` can be asked. cpus: that it may use."""

    where: list[str] | None = option(WHERE, metavar="CONDITION")
    one_per_study: Literal["thinnest", "thickest"] | None = option("One series of each study.")
    min_slices: int = option("Only series with at least so many slices.", 0, metavar="N", min=0)
    series: list[str] | None = option(
        "Only this SeriesInstanceUID; may be repeated.", metavar="UID", advanced=True
    )
    originals_only: bool = option("Leave out images that were computed from other images.", False)
    split: bool = option("A stack whose spacing changes once becomes two volumes.", False)
    keep_tilt: bool = option(
        "Keep a gantry tilt as a sheared affine, nothing resampled. Training and upsample don't take it.",
        False,
        advanced=True,
    )
    pad_hu: float = option(
        "What scanner padding becomes.", -1024.0, metavar="HU", advanced=True, min=-32768, max=0
    )
    names: Literal["hash", "patient"] = option(
        "patient: file names with the patient ID, for public collections only.", "hash"
    )
    link: Path | None = option(
        "Write a table from names to patient, study and series, for its owner alone, outside OUT.",
        metavar="FILE",
        advanced=True,
    )
    splits: str = option(
        "Shares of the patients in the lists, in percent.", "80,10,10", metavar="TRAIN,VAL,TEST"
    )
    workers: int | None = option(
        "Series converted at once; default: as many as CPUs and memory allow.",
        min=1,
        metavar="N",
        advanced=True,
    )
    overwrite: bool = o.overwrite()
    skip_existing: bool = o.skip_existing()
    shard: str | None = o.shard()
    is_dry_run: bool = option(
        "Show what would happen, write nothing; no pixel is decoded.", False, "--dry-run"
    )
    project: Path | None = o.project()
    seed: int = o.seed()
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.overwrite and self.skip_existing:
            raise UsageError("--overwrite and --skip-existing exclude each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """What `upsample` can be asked that concerns files, not volumes."""

    preview: Path | None = option("Picture of before and after.", metavar="PNG")
    save_added: Path | None = option(
        "What the network added that the measurement does not determine, HU.", metavar="FILE"
    )
    save_uncertainty: Path | None = option(
        "Spread of the samples, HU.", metavar="FILE", panel="With --model diffusion"
    )
    overwrite: bool = o.overwrite()
    skip_existing: bool = o.skip_existing()
    is_dry_run: bool = option("Say what would be done, and with how much memory.", False, "--dry-run")
    form: str | None = o.form()
    hu_offset: float = o.hu_offset()
    like: Path | None = option(
        "DICOM out for an image file: the series that lends patient, study and frame.",
        metavar="SERIES",
        advanced=True,
    )
    random_uids: bool = option("DICOM out: new UIDs at every run.", False, advanced=True)
    threads: int | None = o.threads()
    seed: int = o.seed()

    def __post_init__(self) -> None:
        if self.overwrite and self.skip_existing:
            raise UsageError("--overwrite and --skip-existing exclude each other")

    @property
    def beside(self) -> list[Path]:
        """What is written beside the result."""
        return [p for p in (self.save_added, self.save_uncertainty, self.preview) if p is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What `simulate` can be asked. Lengths in mm, of the thick slices; without any of them, factor 2."""

    thickness: float | None = o.length(
        "Slice thickness of the result; default: its spacing. Alone, it is the spacing too."
    )
    spacing: float | None = o.length(
        "Slice spacing of the result: below the thickness slices overlap, above it there are gaps."
    )
    factor: float | None = option("Instead of --spacing: how many times the input's (default 2).")
    profile: str = option(o.PROFILE + " The file's is from thin to thick.", "gaussian")
    noise: float = option("Standard deviation added to the thick slices.", 0.0, metavar="HU")
    overwrite: bool = o.overwrite()
    axis: int | None = o.axis()
    form: str | None = o.form()
    hu_offset: float = o.hu_offset()
    seed: int = o.seed()

    def __post_init__(self) -> None:
        if self.factor is not None and self.spacing is not None:
            raise UsageError("--factor and --spacing exclude each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to come of an evaluation."""

    out: Path | None = option("Everything, as .csv or .json.", metavar="FILE")
    figure: Path | None = option("Picture of truth, thick, cubic, result, error.", metavar="PNG")
    require: list[str] | None = option('Such as "psnr>=35", repeatable; exit 9 if not met.', metavar="COND")
    overwrite: bool = o.overwrite()
