"""Feature files or roll-out to `Batch`: targets, chat masks, extraction, vocabulary maps, generators."""
