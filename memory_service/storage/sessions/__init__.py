"""Sessions as every engine over a database keeps them: what changes together, what a row says, and what goes with a
session. An engine brings the statements (`rows`) and its transactions."""
