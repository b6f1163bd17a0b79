"""From conversations to `Batch`: target, chat masks, extraction, vocabulary maps, generators."""
