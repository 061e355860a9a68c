"""Names the file through which a test holds turns at a token boundary."""

VARIABLE = "LAGWISE_TEST_GATE"
