"""What puts n3 operators where other libraries' users already are."""
