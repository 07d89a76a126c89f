# SPDX-License-Identifier: Apache-2.0
"""Find where a training step spends time and memory: ``samfast profile``, ``samfast.profile``.

recorder    decides which step is warmed up, counted and timed; torch.profiler takes the times
counted     what a step launches, moves, computes and keeps, by samfast.counters
timeline    the profiler's events, cut into pieces of which each belongs to one operation
tables      joins times, counts and ceilings; text, plot and page show them
"""
