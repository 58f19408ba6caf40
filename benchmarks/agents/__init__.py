"""Sessions in a closed loop, which together need more cache than the fleet has: turns an hour and waits, by rule."""
