"""What the exits do, and how to spend a budget: dense runs, calibration, figures."""
