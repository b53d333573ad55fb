"""Stress: kills, faults of the disk, damaged files, races and hostile input, thousands of each, from outside.

    python -m tests.stress                     the whole table, into tests/stress/latest.json
    python -m tests.stress --scale smoke       two minutes of it
    python -m tests.stress kills --count 50    one campaign
    python -m tests.stress kills --only 17     one trial of it, told in full

A tiny pipeline is run undisturbed once (`pipeline`), then each campaign disturbs it in its own way, many times, and
judges what a user would be left with. A trial follows from (campaign, seed, its number), so that it can be repeated.

    faults, fault.c   the n-th file operation fails, comes short, or is the last
    children          a command in a forked child: no imports, seconds saved
    workers           many trials side by side, with a limit of time for each
    content           whether two outputs are the same, but for times and versions
    rows              what is counted
"""
