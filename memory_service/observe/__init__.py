"""What operators see: metrics, logs, requests under way, and troubles that last."""
