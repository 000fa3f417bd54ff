"""Banks of texts are kept here: texts go in, and the nearest ones come out, without a model that attends to them."""
