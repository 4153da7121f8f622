"""What a run leaves behind: recipe, results, report, model card, and their upload."""
