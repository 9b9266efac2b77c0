"""Metrics as pure functions of arrays and of counts; nothing here reads a file.

Legend of the shape suffixes: ``N`` rows, ``K`` classes, ``B`` reliability bins, ``R`` bootstrap replicates,
``G`` groups of rows, ``M`` sums over rows.
Undefined values (a class without rows, an area with one class only) are NaN; writers turn NaN into null.
"""
