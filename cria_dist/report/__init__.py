"""What a person sees of a run: progress while it works, tables, plots and one HTML page when it is done."""
