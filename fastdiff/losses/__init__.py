"""The training losses: functions (models, batch) -> loss of each sample (B,), without any loop."""
