"""When each stage does what: making, timing and checking schedules."""
