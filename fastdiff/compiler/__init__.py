"""Papers to tables: symbolic registers, solvers, plans and their checks. NumPy and float64."""
