"""Prints the bytes that a meter sees of 64 MiB, of 4 MiB, and of 64 MiB on two devices.

In a process of its own: the allocator counts for the whole process, in which tests before may have
left threads that take memory.
"""

import tensorflow as tf

from tfbig._keras import memory

MIB = 2**20


@tf.function
def take(elements):
    return tf.reduce_sum(tf.fill([elements], 1.5))


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    one, two = memory.Meter(["CPU:0"]), memory.Meter(["CPU:0", "CPU:1"])
    take(tf.constant(1))
    for meter, elements in ((one, 16 * MIB), (one, MIB), (two, 16 * MIB)):
        print(meter(lambda elements=elements: take(tf.constant(elements))))


if __name__ == "__main__":
    main()
