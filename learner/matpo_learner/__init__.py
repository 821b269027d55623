"""matpo_learner."""
