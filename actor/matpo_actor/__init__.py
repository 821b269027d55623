"""matpo_actor."""
