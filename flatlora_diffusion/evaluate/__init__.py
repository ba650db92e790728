"""What an adapter changes, in figures: personalisation, retention, flatness, sharpness, trade-off."""
