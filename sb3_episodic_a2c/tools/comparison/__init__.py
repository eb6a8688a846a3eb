"""Algorithms side by side: a grid of trainings (algorithm x environment x seed), with statistics, tables and plots."""
