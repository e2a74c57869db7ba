"""The only code that reads or writes model folders."""
