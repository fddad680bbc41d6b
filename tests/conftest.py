"""What holds for every test: machines are noisy, so no property fails because one example took long."""

from hypothesis import HealthCheck, settings

settings.register_profile("tangram", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tangram")
