"""The job that this process is part of: who it is, the session that `smp.init()` makes, messages between ranks."""
