"""Messages between the stages of a pipeline, and what is known of a stage that is waited for."""
