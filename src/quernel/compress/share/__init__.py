"""Methods that let many weights share one small array."""
