"""What a run of the suites found: as ``results.json``, as one HTML page, as verdicts in the terminal."""
