"""Arithmetic of a run that does not fit in memory: what stays, what streams, what a token costs, which settings pay. No torch, no weights.

    plan       which matrices a budget holds, and what every part of memory is charged with
    profile    what a device can do and how much a method is accepted, as measured, from and to JSON
    cost       seconds of a cycle, bytes per token
    planner    the settings with the most tokens per second, and why
"""
