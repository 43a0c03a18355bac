"""What several tests share; the only place that tests import from, with tests.reference."""
