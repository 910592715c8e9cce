"""Solutions as values in four libraries: the lines that a problem takes, its error and its time."""
