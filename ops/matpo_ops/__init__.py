"""matpo_ops."""
