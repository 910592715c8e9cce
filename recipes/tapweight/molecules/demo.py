"""The demonstration: TapWeight on molecules that ship with the project, with labels that RDKit computes."""
