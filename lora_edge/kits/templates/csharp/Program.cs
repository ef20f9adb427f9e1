using System;
using System.Collections.Generic;
using System.IO;

/// <summary>
/// generate [--adapter NAME]... [--max-new-tokens 64] TOKEN...: the tokens behind a prompt, a line for each
/// adapter that is named, in that order.
/// </summary>
static class Program
{
    const string Usage = "generate [--adapter NAME]... [--max-new-tokens 64] TOKEN...";

    static int Main(string[] words)
    {
        try
        {
            Run(words);
            return 0;
        }
        catch (Exception error)
        {
            Console.Error.WriteLine($"error: {error.Message}");
            return 2;
        }
    }

    static void Run(string[] words)
    {
        var adapters = new List<string>();
        var prompt = new List<long>();
        var most = 64;
        for (var index = 0; index < words.Length; index++)
        {
            var word = words[index];
            if (word != "--adapter" && word != "--max-new-tokens")
            {
                prompt.Add(Number(word));
                continue;
            }
            if (++index == words.Length)
            {
                throw new ArgumentException($"{word} needs a value");
            }
            if (word == "--adapter")
            {
                adapters.Add(words[index]);
            }
            else
            {
                most = (int)Math.Min(Number(words[index]), int.MaxValue);
            }
        }
        if (prompt.Count == 0)
        {
            throw new ArgumentException($"usage: {Usage}");
        }
        if (adapters.Count == 0)
        {
            adapters.Add(Facts.Default);
        }
        using (var model = new Model(Path.Combine(AppContext.BaseDirectory, "bundle")))
        {
            foreach (var adapter in adapters)
            {
                Console.WriteLine($"{adapter}: {string.Join(" ", model.Generate(prompt.ToArray(), adapter, most))}");
            }
        }
    }

    static long Number(string text)
    {
        if (!long.TryParse(text, out var number) || number < 0)
        {
            throw new ArgumentException($"{text} is not a whole number; usage: {Usage}");
        }
        return number;
    }
}
