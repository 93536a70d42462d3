"""What the documentation names exists: commands, options, files, names to import, the changelog's section."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import ctsr
from ctsr.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE_BY_BENCHMARKS = {  # may be missing where nothing was measured yet; checked as soon as they are there
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "examples" / "before-after.png",
    ROOT / "docs" / "examples" / "chest_2.5mm.nii.gz",
}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_CALL = re.compile(r"(?:^|[\s;&|(])ctsr(?:\.sif|:[\d.]+)? (?=[a-z-]+(?:\s|$))")  # also as a container image
_LINK = re.compile(r"\]\(([^)\s]+)(?:\s[^)]*)?\)")
_INLINE = re.compile(r"`ctsr ([a-z][a-z-]*)[^`]*`")

root_command = typer.main.get_command(app)
COMMANDS = root_command.commands  # type: ignore[attr-defined]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page, text) of each fenced block of a language."""
    for page in PAGES:
        for found, text in _FENCE.findall(page.read_text("utf-8")):
            if found == language:
                yield page.name, text


def calls(text: str) -> Iterator[list[str]]:
    """The words after `ctsr` of each call in a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        for found in _CALL.finditer(line):
            rest = line[found.end() :]
            for quote in "'\"":  # the call stands in quotes that end after it
                rest = rest.rpartition(quote)[0] if rest.count(quote) % 2 else rest
            words = shlex.shlex(rest, posix=True, punctuation_chars=";&|")
            words.whitespace_split, words.commenters = True, "#"
            call = []
            for word in words:
                if set(word) <= set(";&|"):
                    break
                call.append(word)
            yield call


CALLS = [(page, call) for page, text in blocks("bash") for call in calls(text)]
PYTHON = list(blocks("python"))


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = _FENCE.sub("", page.read_text("utf-8"))
        yield from ((page, target) for target in _LINK.findall(text))


def test_the_pages_show_calls_and_python():
    assert len(CALLS) > 30
    assert len(PYTHON) > 5


@pytest.mark.parametrize(("page", "call"), CALLS, ids=[" ".join(call)[:60] for _, call in CALLS])
def test_a_call_names_a_command_and_its_options(page, call):
    if call[0].startswith("-"):
        options = {opt for p in root_command.params for opt in p.opts} | {"--help"}
        assert set(call) <= options, page
        return
    name, *words = call
    assert name in COMMANDS, page
    parameters = COMMANDS[name].params
    options = {opt: p for p in parameters for opt in (*p.opts, *p.secondary_opts)}
    n_arguments = sum(p.param_type_name == "argument" for p in parameters)
    at, positional = 0, 0
    while at < len(words):
        word, at = words[at], at + 1
        if not word.startswith("-"):
            positional += 1
            continue
        if word in ("-h", "--help"):
            continue
        option, _, value = word.partition("=")
        assert option in options, f"{page}: {name} has no {option}"
        if not options[option].is_flag and not value:
            at += options[option].nargs
            assert at <= len(words), f"{page}: {option} lacks its value"
    assert positional <= n_arguments, f"{page}: {name} takes {n_arguments} arguments"


def test_a_command_that_is_named_in_the_text_exists():
    named = {(page.name, word) for page in PAGES for word in _INLINE.findall(page.read_text("utf-8"))}
    assert {(page, word) for page, word in named if word not in COMMANDS} == set()


def test_every_relative_link_and_picture_leads_somewhere():
    lost = []
    for page, target in links():
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if path in MADE_BY_BENCHMARKS and not path.exists():
            continue
        if not path.exists() or (anchor and anchor not in anchors(path)):
            lost.append(f"{page.name}: {target}")
    assert lost == []


def anchors(page: Path) -> set[str]:
    """The names that headings get, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_page_is_on_the_map():
    on_the_map = {target for page, target in links() if page.name == "index.md"}
    assert {page.name for page in PAGES[1:]} - on_the_map - {"index.md"} == set()


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_compiles_and_what_it_takes_from_ctsr_exists(page, text):
    compile(text, page, "exec")
    for module, names in re.findall(r"^\s*from (ctsr[\w.]*) import (.+)$", text, re.M):
        for name in re.split(r"[,\s()]+", names.strip("() ")):
            assert hasattr(importlib.import_module(module), name), f"{page}: {module}.{name}"
    for name in re.findall(r"\bctsr\.(\w+)\b(?!\.)", re.sub(r"^\s*from .*$", "", text, flags=re.M)):
        assert name in ctsr.__all__, f"{page}: ctsr.{name}"


def test_the_readme_begins_with_the_two_commands_that_do_everything():
    first = [text.strip() for page, text in blocks("bash") if page == "README.md"][:2]
    assert first == [
        "pip install -c constraints.txt . && ctsr upsample docs/examples/chest_2.5mm.nii.gz out.nii.gz",
        'pip install -c constraints.txt ".[dev]" && pytest',
    ]


def test_the_readme_says_what_it_is_not():
    assert "not a medical device" in (ROOT / "README.md").read_text("utf-8")


def test_the_changelog_has_a_section_for_what_is_not_released():
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
