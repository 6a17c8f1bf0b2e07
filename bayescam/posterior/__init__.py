"""The Bayesian last layer: model, MAP, curvature, Laplace, evidence, refinement, NUTS, predictives."""
