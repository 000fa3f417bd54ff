"""Tenants and their API keys as every engine over a database keeps them. An engine brings the statements (`rows`) and
its transactions."""
