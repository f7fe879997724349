"""Arithmetic of a run that does not fit in memory: what stays, what streams, what a token costs, which method pays. No torch, no weights.

    plan       which matrices a budget holds, and what every part of memory is charged with
    profile    what a machine takes for the parts of a cycle and how much a method is accepted, as measured, from and to JSON
    cost       seconds of a cycle
    planner    the method with the most tokens per second within a budget, and why
"""
