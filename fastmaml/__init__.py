"""fastmaml"""
