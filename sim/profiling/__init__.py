"""How a profile is measured. The simulator does not import this package."""
