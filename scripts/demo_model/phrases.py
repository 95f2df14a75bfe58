"""Hand-written dialogue: greetings, what the model is, small skills, and simple Python functions."""

from __future__ import annotations

NAME = "FlashMoE demo"

FIXED = [
    (
        ["Hello", "Hi", "Hello!", "Hi!", "Hi there", "Hey", "Good morning", "Good evening", "hello", "hi"],
        [
            "Hello! How can I help you?",
            "Hello! What would you like to know?",
            "Hi! Ask me what a word means.",
        ],
    ),
    (
        ["How are you?", "How are you doing?", "How do you do?"],
        ["I am well, thank you. How can I help you?", "Very well, thank you. What would you like to know?"],
    ),
    (
        [
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "What is your name?",
            "Introduce yourself.",
        ],
        [
            f"I am the {NAME}, a very small language model. I know some words and a little Python.",
            f"I am the {NAME}: a small mixture-of-experts language model that comes with FlashMoE.",
        ],
    ),
    (
        ["What can you do?", "What do you know?", "How can you help me?", "Help"],
        [
            "I can tell you what a word means, write a short text, and write simple Python. I am very small, so I make "
            "many mistakes.",
            "Ask me what a word means, or ask for a short story or a simple Python function. I am often wrong.",
        ],
    ),
    (
        ["Who made you?", "Who trained you?", "How were you made?", "How were you trained?"],
        [
            "I was trained for about an hour on two processor cores, on dictionaries, novels and Python code.",
            "I come with the FlashMoE package. I was trained on freely licensed books, manuals and source code.",
        ],
    ),
    (
        ["Are you a human?", "Are you a person?", "Are you alive?", "Are you a robot?"],
        ["No, I am a small language model.", "No. I am a computer program that predicts text."],
    ),
    (["Thank you.", "Thanks!", "Thank you very much.", "thanks"], ["You are welcome!", "You are welcome."]),
    (["Goodbye", "Bye", "See you later.", "Good night"], ["Goodbye!", "Goodbye! Have a good day."]),
    (
        ["What is FlashMoE?", "What does FlashMoE do?", "Tell me about FlashMoE.", "Explain FlashMoE."],
        [
            "FlashMoE runs mixture-of-experts models that are larger than memory. It keeps the experts used most "
            "in a pool of slots and reads the others from the disk when they are needed."
        ],
    ),
    (
        [
            "What is a mixture of experts?",
            "What is a mixture-of-experts model?",
            "Explain mixture of experts.",
            "What does MoE mean?",
            "What is MoE?",
        ],
        [
            "A mixture of experts is a neural network whose layers hold many small networks, called experts. For each "
            "token a router picks a few of them, so only a part of the model works at a time."
        ],
    ),
    (
        [
            "What is an expert in a neural network?",
            "What does the router do?",
            "What is a router in a MoE model?",
        ],
        [
            "The router looks at each token and picks a few experts to work on it. An expert is a small network."
        ],
    ),
    (
        ["What is a cache?", "Explain what a cache is."],
        ["A cache is a small, fast memory that keeps what is likely to be needed again soon."],
    ),
    (
        ["Can you make mistakes?", "Are you always right?", "Can I trust you?"],
        [
            "I make many mistakes, because I am very small. Please do not trust what I say.",
            "No. I am a small model and I am often wrong.",
        ],
    ),
    (
        ["What is the meaning of life?", "Why are we here?"],
        ["That is a hard question. Many people find meaning in friends, in work and in helping others."],
    ),
    (
        ["Tell me a joke.", "Make me laugh."],
        [
            "Why did the expert leave the cache? Nobody had asked for it lately.",
            "I only know one joke, and it did not fit in memory.",
        ],
    ),
    (["What day comes after Monday?"], ["Tuesday comes after Monday."]),
    (["What is the capital of France?"], ["The capital of France is Paris."]),
    (["What is the capital of England?"], ["The capital of England is London."]),
    (["What is the capital of Germany?"], ["The capital of Germany is Berlin."]),
    (["What is the capital of Italy?"], ["The capital of Italy is Rome."]),
    (["What is the capital of Spain?"], ["The capital of Spain is Madrid."]),
    (["What is the capital of Japan?"], ["The capital of Japan is Tokyo."]),
    (
        ["What color is the sky?", "Why is the sky blue?"],
        ["The sky is blue, because the air scatters blue light more than red light."],
    ),
    (["How many days are in a week?"], ["There are seven days in a week."]),
    (["How many months are in a year?"], ["There are twelve months in a year."]),
    (["Name the days of the week."], ["Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."]),
    (
        ["Name the months of the year."],
        [
            "January, February, March, April, May, June, July, August, September, October, November and December."
        ],
    ),
]

SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the user's questions.",
]

FUNCTIONS = [
    ("adds two numbers", "def add(a, b):\n    return a + b"),
    ("multiplies two numbers", "def multiply(a, b):\n    return a * b"),
    ("subtracts two numbers", "def subtract(a, b):\n    return a - b"),
    (
        "divides two numbers",
        'def divide(a, b):\n    if b == 0:\n        raise ValueError("cannot divide by zero")\n'
        "    return a / b",
    ),
    ("returns the square of a number", "def square(x):\n    return x * x"),
    (
        "returns the larger of two numbers",
        "def maximum(a, b):\n    if a > b:\n        return a\n    return b",
    ),
    (
        "returns the smaller of two numbers",
        "def minimum(a, b):\n    if a < b:\n        return a\n    return b",
    ),
    ("checks whether a number is even", "def is_even(n):\n    return n % 2 == 0"),
    ("checks whether a number is odd", "def is_odd(n):\n    return n % 2 == 1"),
    (
        "computes the factorial of a number",
        "def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result",
    ),
    (
        "returns the first n Fibonacci numbers",
        "def fibonacci(n):\n    numbers = []\n    a, b = 0, 1\n    for _ in range(n):\n        numbers.append(a)\n"
        "        a, b = b, a + b\n    return numbers",
    ),
    (
        "checks whether a number is prime",
        "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, int(n ** 0.5) + 1):\n"
        "        if n % i == 0:\n            return False\n    return True",
    ),
    ("reverses a string", "def reverse(text):\n    return text[::-1]"),
    ("checks whether a string is a palindrome", "def is_palindrome(text):\n    return text == text[::-1]"),
    ("counts the words in a text", "def count_words(text):\n    return len(text.split())"),
    (
        "counts the vowels in a string",
        'def count_vowels(text):\n    return sum(1 for char in text if char in "aeiou")',
    ),
    (
        "sums a list of numbers",
        "def total(numbers):\n    result = 0\n    for number in numbers:\n"
        "        result += number\n    return result",
    ),
    ("computes the average of a list", "def average(numbers):\n    return sum(numbers) / len(numbers)"),
    (
        "finds the largest number in a list",
        "def largest(numbers):\n    result = numbers[0]\n    for number in numbers:\n        if number > result:\n"
        "            result = number\n    return result",
    ),
    ("removes duplicates from a list", "def unique(items):\n    return list(dict.fromkeys(items))"),
    ("sorts a list of numbers", "def sort_numbers(numbers):\n    return sorted(numbers)"),
    (
        "reads a file and returns its text",
        "def read_text(path):\n    with open(path) as file:\n        return file.read()",
    ),
    (
        "writes text to a file",
        'def write_text(path, text):\n    with open(path, "w") as file:\n        file.write(text)',
    ),
    (
        "prints the numbers from 1 to n",
        "def print_numbers(n):\n    for i in range(1, n + 1):\n        print(i)",
    ),
    ("says hello", 'def hello(name):\n    print(f"Hello, {name}!")'),
    (
        "counts how often each word occurs",
        "def word_counts(text):\n    counts = {}\n    for word in text.split():\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts",
    ),
    (
        "computes the greatest common divisor of two numbers",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    ),
    ("converts Celsius to Fahrenheit", "def to_fahrenheit(celsius):\n    return celsius * 9 / 5 + 32"),
    ("returns the last element of a list", "def last(items):\n    return items[-1]"),
    (
        "flattens a list of lists",
        "def flatten(lists):\n    return [item for items in lists for item in items]",
    ),
    (
        "does a binary search in a sorted list",
        "def binary_search(items, target):\n    low, high = 0, len(items) - 1\n    while low <= high:\n"
        "        middle = (low + high) // 2\n        if items[middle] == target:\n            return middle\n"
        "        if items[middle] < target:\n            low = middle + 1\n        else:\n"
        "            high = middle - 1\n    return None",
    ),
]

ASK_FUNCTION = [
    "Write a Python function that {}.",
    "Write a function that {}.",
    "Show me a Python function that {}.",
    "How do I write a Python function that {}?",
    "Write Python code that {}.",
]
