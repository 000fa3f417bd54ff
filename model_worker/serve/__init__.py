"""One model for many sessions: who may use it next, who waits, and what a request does with it."""
