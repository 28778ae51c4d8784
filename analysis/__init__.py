"""What runs mean: metrics, comparison, reports, the command line. It reads records, and never a backend's state."""
