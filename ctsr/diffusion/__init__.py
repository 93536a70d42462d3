"""From y₀, the latent of stage one, to x₀, the latent of the thin truth: paths and samplers.

Everything is written for the residual: r = x₀ − y₀, and the state u = x − y₀ = a r + s ε, in which y₀ drops out.
"""
