"""The commands: a module for each group, with an `app` that `analysis.cli.main` puts into its place."""
