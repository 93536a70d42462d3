"""From y₀, the latent of stage one, to x₀, the latent of the thin truth: schedules, process, samplers.

Everything is written for the residual: r = x₀ − y₀, and the state u = x − y₀ = a r + s ε, with a signal share a and
a noise share s that a path gives for each level in (0, 1]. ResShift (`Schedule`) has a = 1 − level², s = κ·level with
level = √η; rectified flow (`Flow`) has a = 1 − level, s = scale·level. All else is the same for both.
"""
