"""The MQTT bridge: plain JSON and Sparkplug B from a broker into the same door."""
