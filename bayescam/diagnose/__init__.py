"""ArviZ export, convergence, Laplace against NUTS, calibration, simulation-based calibration."""
