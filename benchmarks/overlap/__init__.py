"""The suite `overlap`: two ranks over a link of a given rate, training steps with and without hidden exchanges."""
