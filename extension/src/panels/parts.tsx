// Small things that several parts of the sidebar are made of.
import * as React from 'react';
import type { CommandRegistry } from '@lumino/commands';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { LabIcon } from '@jupyterlab/ui-components';
import type { Arguments, View } from '../tokens';

/** What every part of the sidebar gets. */
export interface PartProps {
  readonly view: View;
  readonly trans: TranslationBundle;
  readonly commands: CommandRegistry;
  readonly perform: (verb: string, args?: Arguments) => Promise<boolean>;
}

export function can(view: View, verb: string): boolean {
  return view.snapshot?.can.includes(verb) ?? false;
}

export interface IconButtonProps {
  readonly icon: LabIcon;
  readonly label: string;
  readonly caption?: string;
  readonly disabled?: boolean;
  readonly tabIndex?: number;
  readonly onClick: () => void;
}

/**
 * A real button with an icon; its name is what it does. Disabled, it can still be gone to: who
 * pressed it by key, and runs something by that, keeps the place.
 */
export function IconButton(props: IconButtonProps): React.ReactElement {
  const Icon = props.icon;
  return (
    <button
      type="button"
      className="jp-Djinn-iconButton"
      aria-label={props.label}
      title={props.caption ?? props.label}
      aria-disabled={props.disabled ? true : undefined}
      tabIndex={props.tabIndex}
      onClick={props.disabled ? undefined : props.onClick}
    >
      <Icon.react tag="span" aria-hidden="true" />
    </button>
  );
}

export interface CommandButtonProps {
  readonly commands: CommandRegistry;
  readonly id: string;
  readonly tabIndex?: number;
}

/** A command of the lab as an icon button, in the words of the palette. */
export function CommandButton(props: CommandButtonProps): React.ReactElement {
  const { commands, id } = props;
  return (
    <IconButton
      icon={commands.icon(id) as LabIcon}
      label={commands.label(id)}
      caption={commands.caption(id)}
      disabled={!commands.isEnabled(id)}
      tabIndex={props.tabIndex}
      onClick={() => {
        void commands.execute(id);
      }}
    />
  );
}

/** How far something is; null: nobody knows. */
export function Progress(props: {
  readonly done: number | null;
  readonly label: string;
}): React.ReactElement {
  return (
    <progress
      className="jp-Djinn-progress"
      aria-label={props.label}
      max={1}
      {...(props.done === null ? {} : { value: props.done })}
    />
  );
}
