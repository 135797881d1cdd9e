"""Hot blocks for CPU and GPU.

hashing    which elements a random drop keeps (no torch: the planner uses it too)
cpu        compiled loops
codes      compiled loops of quantised weights
plain      the same in torch: their specification, and what a GPU runs
dispatch   one interface over both
"""
