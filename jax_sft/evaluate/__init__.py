"""What a model does: loss and accuracy by source (losses), answers to prompts (answers)."""
