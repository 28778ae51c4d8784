"""The commands, a module for each group; each has an `app` that `analysis.cli` puts into its place.

What takes long to import is imported by the command that needs it: a simulation must start without torch.
"""
