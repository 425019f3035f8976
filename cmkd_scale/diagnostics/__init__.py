"""What is measured of a student: its class structure beside a teacher's, and its error bound."""
